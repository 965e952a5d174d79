// A training's loss curve, from its log lines.

import { say } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const LOSS = /epoch (\d+)\/\d+.*?\bloss=(\d+(?:\.\d+)?(?:e-?\d+)?)/;
const BOX = { left: 34, right: 312, top: 8, bottom: 112, width: 320, height: 132 };

/** {epoch, loss} of each line that contains them. */
export function lossesOf(lines) {
  return lines.flatMap(({ message }) => {
    const found = LOSS.exec(message ?? "");
    return found && Number.isFinite(Number(found[2])) ? [{ epoch: Number(found[1]), loss: Number(found[2]) }] : [];
  });
}

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const short = (loss) => Number(loss.toPrecision(2)).toString();

/** Draw the points with axes into `figure`, if there are at least two. */
export function drawLosses(figure, points) {
  figure.hidden = points.length < 2;
  if (figure.hidden) return;
  const most = Math.max(...points.map(({ loss }) => loss)) || 1;
  const [first, last] = [points[0], points.at(-1)];
  const epochs = Math.max(1, last.epoch - first.epoch);
  const x = (epoch) => BOX.left + ((BOX.right - BOX.left) * (epoch - first.epoch)) / epochs;
  const y = (loss) => BOX.bottom - ((BOX.bottom - BOX.top) * loss) / most;
  const label = say("loss.label", { first: String(first.loss), from: first.epoch, last: String(last.loss), to: last.epoch });
  const drawn = svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": label });
  for (const loss of [0, most / 2, most]) {
    drawn.append(svg("line", { x1: BOX.left, x2: BOX.right, y1: y(loss), y2: y(loss) }));
    drawn.append(svg("text", { x: BOX.left - 4, y: y(loss) + 3, "text-anchor": "end" }, short(loss)));
  }
  drawn.append(svg("text", { x: BOX.left, y: BOX.bottom + 14 }, `${say("loss.epoch")} ${first.epoch}`));
  drawn.append(svg("text", { x: BOX.right, y: BOX.bottom + 14, "text-anchor": "end" }, last.epoch));
  drawn.append(svg("path", { d: `M${points.map(({ epoch, loss }) => `${x(epoch)} ${y(loss)}`).join("L")}` }));
  drawn.append(svg("circle", { cx: x(last.epoch), cy: y(last.loss), r: 3 }));
  const caption = document.createElement("figcaption");
  caption.textContent = say("loss.now", { loss: String(last.loss), epoch: last.epoch });
  figure.replaceChildren(drawn, caption);
}
