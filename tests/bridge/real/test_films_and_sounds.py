"""Films and sounds on a real ComfyUI, through the whole system: uploaded, loaded, saved in every kind, handed out."""

from __future__ import annotations

import io
import math
import struct
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import pytest_asyncio

from comfyui_temporal import InvalidInput
from tests.bridge.real.test_jobs import new_seed
from tests.bridge.real.whole_stack import Json, WholeStack, whole_stack
from tests.bridge.template_folders import node, written

pytestmark = pytest.mark.timeout(600)
RATE, SECONDS = 16_000, 2
FRAMES, FRAMES_PER_SECOND = 16, 8
SOUND, FILM, COPY = "sounds", "film", "film-copy"
COPY_PRICE, SOUND_PRICE = 7, 5
AS_AUTO = {"format": "auto", "codec": "auto"}


def of_sounds() -> Json:
    """One sound, saved in each kind that ComfyUI offers."""
    audio = {"audio": ["1", 0], "filename_prefix": "x"}
    return {
        "1": node("LoadAudio", "Load sound", audio="none.wav"),
        "2": node("SaveAudio", "Lossless", **audio),
        "3": node("SaveAudioMP3", "Small", quality="V0", **audio),
        "4": node("SaveAudioOpus", "Smaller", quality="64k", **audio),
    }


def of_film() -> Json:
    """A film in each kind; the MP4 with the request's sound, if there is one."""
    ground = {"width": 64, "height": 64, "batch_size": FRAMES, "color": 0}
    frames = {"images": ["1", 0], "fps": FRAMES_PER_SECOND}
    return {
        "1": node("EmptyImage", "Ground", **ground),
        "2": node("CreateVideo", "Silent film", **frames),
        "3": node("LoadAudio", "Load sound", audio="none.wav"),
        "4": node("CreateVideo", "Film with sound", audio=["3", 0], **frames),
        "5": node("SaveVideo", "Film", video=["2", 0], filename_prefix="x", **AS_AUTO),
        "6": node("SaveWEBM", "For pages", filename_prefix="x", codec="vp9", crf=32.0, **frames),
        "7": node(
            "SaveAnimatedWEBP",
            "Moving picture",
            filename_prefix="x",
            lossless=True,
            quality=80,
            method="default",
            **frames,
        ),
    }


def of_copy() -> Json:
    """The request's film again, its first picture and its sound."""
    return {
        "1": node("LoadVideo", "Load film", file="none.mp4"),
        "2": node("GetVideoComponents", "Parts", video=["1", 0]),
        "3": node("SaveVideo", "Film", video=["1", 0], filename_prefix="x", **AS_AUTO),
        "4": node("ImageFromBatch", "First picture", image=["2", 0], batch_index=0, length=1),
        "5": node("SaveImage", "Still", images=["4", 0], filename_prefix="x"),
        "6": node("SaveAudio", "Sound", audio=["2", 1], filename_prefix="x"),
    }


def write_templates(folder: Path) -> None:
    sound = '[extras.sound]\ntype = "audio"\ninputs = ["Load sound.audio"]\n'
    seed = '[inputs.seed]\ninputs = ["Ground.color"]\nmodulo = 0x1000000\n'
    written(folder, SOUND, of_sounds(), results=["Lossless", "Small", "Smaller"], manifest=f"{sound}required = true")
    with_sound = f'{seed}{sound}set = {{ "Film.video" = ["Film with sound", 0] }}'
    written(folder, FILM, of_film(), results=["Film", "For pages", "Moving picture"], manifest=with_sound)
    film = '[extras.film]\ntype = "video"\ninputs = ["Load film.file"]\nrequired = true'
    written(folder, COPY, of_copy(), results=["Film", "Still", "Sound"], manifest=film)


@pytest_asyncio.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, comfyui_url: str) -> AsyncIterator[WholeStack]:
    folder = tmp_path_factory.mktemp("films")
    write_templates(folder / "templates")
    prices = {"sound": SOUND_PRICE, "film": COPY_PRICE}
    async with whole_stack(folder, [comfyui_url], [SOUND, FILM, COPY], prices) as stack:
        yield stack


def tone() -> bytes:
    """Two seconds of A, as a WAV file."""
    samples = [int(12_000 * math.sin(2 * math.pi * 440 * number / RATE)) for number in range(RATE * SECONDS)]
    with io.BytesIO() as file:
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(RATE)
            sound.writeframes(struct.pack(f"<{len(samples)}h", *samples))
        return file.getvalue()


async def delivered(stack: WholeStack, template_id: str, **fields: object) -> dict[str, tuple[str, bytes]]:
    """Run a task to its end. File name → content type and bytes."""
    outcome = await stack.completed(await stack.start(template_id, **fields))
    found = {}
    for url in outcome.result_urls:
        answer = await stack.http.get(url)
        assert answer.status_code == 200
        part = await stack.http.get(url, headers={"range": "bytes=4-11"})
        assert (part.status_code, part.content) == (206, answer.content[4:12]), "players skip through a file by Range"
        assert part.headers["content-type"] == answer.headers["content-type"]
        assert b"class_type" not in answer.content, "the graph is left out"
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        found[name] = (answer.headers["content-type"], answer.content)
    return found


def types_of(found: dict[str, tuple[str, bytes]]) -> dict[str, str]:
    return {name: content_type for name, (content_type, _) in found.items()}


def flac_samples(content: bytes) -> tuple[int, int]:
    """(samples per second, samples) by a FLAC file's first block."""
    assert content.startswith(b"fLaC")
    (packed,) = struct.unpack(">Q", content[18:26])
    return packed >> 44, packed & (1 << 36) - 1


async def test_an_uploaded_sound_is_saved_in_every_kind(stack: WholeStack) -> None:
    sound = await stack.tasks.upload(tone())
    assert (sound.kind, sound.content_type) == ("audio", "audio/wav")
    found = await delivered(stack, SOUND, extras={"sound": sound.address})
    assert types_of(found) == {
        "lossless-1.flac": "audio/flac",
        "small-1.mp3": "audio/mpeg",
        "smaller-1.opus": "audio/ogg",
    }
    assert flac_samples(found["lossless-1.flac"][1]) == (RATE, RATE * SECONDS)
    assert found["smaller-1.opus"][1].startswith(b"OggS")


async def test_a_film_gets_the_uploaded_sound_and_is_taken_as_an_upload_itself(stack: WholeStack) -> None:
    silent = await delivered(stack, FILM, extras={"seed": new_seed()})
    assert types_of(silent) == {
        "film-1.mp4": "video/mp4",
        "for-pages-1.webm": "video/webm",
        "moving-picture-1.webp": "image/webp",
    }
    film = silent["film-1.mp4"][1]
    assert film[4:8] == b"ftyp"
    assert b"vide" in film and b"soun" not in film
    sound = await stack.tasks.upload(tone())
    spoken = (await delivered(stack, FILM, extras={"seed": new_seed(), "sound": sound.address}))["film-1.mp4"][1]
    assert b"vide" in spoken and b"soun" in spoken
    upload = await stack.tasks.upload(spoken)
    assert (upload.kind, upload.content_type) == ("video", "video/mp4")
    again = await delivered(stack, COPY, extras={"film": upload.address})
    assert types_of(again) == {"film-1.mp4": "video/mp4", "still-1.png": "image/png", "sound-1.flac": "audio/flac"}
    assert b"soun" in again["film-1.mp4"][1]
    rate, samples = flac_samples(again["sound-1.flac"][1])
    assert samples / rate == pytest.approx(SECONDS, abs=0.2)


async def test_a_sound_where_a_film_is_needed_is_refused_before_it_costs_anything(stack: WholeStack) -> None:
    sound = await stack.tasks.upload(tone())
    with pytest.raises(InvalidInput) as refused:
        await stack.start(COPY, extras={"film": sound.address})
    assert "extras.film" in refused.value.fields
