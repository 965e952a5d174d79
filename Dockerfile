# One image for worker, gateway, table migrations and simulators: they differ by their command (docker-compose.yml).
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app

WORKDIR /app
COPY requirements.lock .
RUN python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock

COPY *.py ./
COPY comfyui_temporal comfyui_temporal
COPY workflows workflows
COPY activities activities
COPY store store
COPY gateway gateway
COPY bridge bridge
COPY runtime runtime
COPY doctor doctor
COPY proof proof
# Compiled once here, and not by every process at its start.
RUN python -m compileall -q --invalidation-mode unchecked-hash /app

RUN useradd --system --create-home --uid 10001 app && mkdir /data && chown app /data
USER app
VOLUME /data

CMD ["python", "worker.py"]
