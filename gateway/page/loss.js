// A training's loss curve, from its log lines.

const SVG = "http://www.w3.org/2000/svg";
const LOSS = /epoch (\d+)\/\d+.*?\bloss=(\d+(?:\.\d+)?(?:e-?\d+)?)/;

/** {epoch, loss} of each line that contains them. */
export function lossesOf(lines) {
  return lines.flatMap(({ message }) => {
    const found = LOSS.exec(message ?? "");
    return found ? [{ epoch: Number(found[1]), loss: Number(found[2]) }] : [];
  });
}

/** Draw the points into `figure`, if there are at least two. */
export function drawLosses(figure, points) {
  figure.hidden = points.length < 2;
  if (figure.hidden) return;
  const most = Math.max(...points.map(({ loss }) => loss)) || 1;
  const [first, last] = [points[0], points.at(-1)];
  const span = Math.max(1, last.epoch - first.epoch);
  const places = points.map(({ epoch, loss }) => `${(100 * (epoch - first.epoch)) / span} ${40 - (38 * loss) / most}`);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Loss from ${first.loss} in epoch ${first.epoch} to ${last.loss} in epoch ${last.epoch}`);
  const ground = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ x1: 0, y1: 40, x2: 100, y2: 40 })) ground.setAttribute(name, value);
  const curve = document.createElementNS(SVG, "path");
  curve.setAttribute("d", `M${places.join("L")}`);
  svg.append(ground, curve);
  const caption = document.createElement("figcaption");
  caption.textContent = `loss ${last.loss} after epoch ${last.epoch}`;
  figure.replaceChildren(svg, caption);
}
