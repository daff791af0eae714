"use strict";
const PER_PAGE = 50;
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const order = new Intl.Collator("en", { numeric: true }).compare;
const whole = (number) => number.toLocaleString("en");

/* Copying: where a page may not use the clipboard, such as in a frame, the older way is tried. */
async function copy(names, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(names.join("\n"));
  } catch {
    const field = document.createElement("textarea");
    field.value = names.join("\n");
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const text = button.dataset.text ?? button.textContent;
  button.dataset.text = text;
  button.textContent = done ? "copied" : "not copied";
  find("said").textContent = done ? `${whole(names.length)} copied` : "the browser does not let this page copy";
  setTimeout(() => { button.textContent = text; }, 1500);
}
document.addEventListener("click", (event) => {
  const button = event.target.closest(".copy, .copy-list");
  if (!button) return;
  const buttons = button.matches(".copy") ? [button] : button.closest("section").querySelectorAll(".copy");
  copy([...new Set([...buttons].map((one) => JSON.parse(one.dataset.copy)))], button);
});

/* A table that is sorted by clicking the head of a column. */
function headers(row, sort) {
  for (const head of row) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const falls = before ? before === "ascending" : head.matches(".number");
      row.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      sort(head, falls ? -1 : 1);
    });
  }
}
for (const table of document.querySelectorAll(".sortable")) {
  headers([...table.tHead.rows[0].cells], (head, sign) => {
    const value = (row) => row.cells[head.cellIndex].textContent.trim();
    const number = (row) => { const found = parseFloat(value(row)); return isNaN(found) ? -1 : found; };
    const numeric = head.matches(".number");
    const compare = (a, b) => sign * (numeric ? number(a) - number(b) : order(value(a), value(b)));
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
}

/* Abstention: the images are in falling order of the probability of their prediction. */
const { probability, right } = data.by_confidence;
const hits = [0];
right.forEach((answer) => hits.push(hits.at(-1) + answer));
const answeredAt = (share) => { // halves go to the even number, as in metrics.json
  const kept = (1 - share) * right.length, below = Math.floor(kept);
  const half = Math.abs(kept - below - 0.5) < 1e-9;
  return Math.max(1, half ? below + (below % 2) : Math.round(kept));
};
function abstain() {
  const share = find("abstain").value / 100, count = answeredAt(share), accuracy = hits[count] / count;
  find("share").textContent = `${find("abstain").value} %`;
  find("rest").textContent = accuracy.toFixed(3);
  find("answered").textContent = `${whole(count)} of ${whole(right.length)}`;
  find("mistakes").textContent = whole(count - hits[count]);
  find("threshold").textContent = probability[count - 1].toFixed(3);
  const dot = find("curve").querySelector("circle");
  dot.setAttribute("cx", placeX(share));
  dot.setAttribute("cy", placeY(accuracy));
}
const shares = [...Array(96).keys()].map((step) => step / 100);
const accuracies = shares.map((share) => hits[answeredAt(share)] / answeredAt(share));
const lowest = Math.min(0.99, Math.floor(20 * Math.min(...accuracies)) / 20);
const width = find("curve").clientWidth || 640; // so that its letters are as large as the others
const placeX = (share) => 44 + (width - 60) * share / 0.95;
const placeY = (accuracy) => 165 - 150 * (accuracy - lowest) / (1 - lowest);
function drawCurve() {
  find("curve").setAttribute("viewBox", `0 0 ${width} 200`);
  const draw = (name, attributes, text = "") => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => part.setAttribute(key, value));
    part.textContent = text;
    find("curve").append(part);
  };
  for (const level of [lowest, (1 + lowest) / 2, 1]) {
    draw("line", { x1: 44, x2: width - 16, y1: placeY(level), y2: placeY(level) });
    draw("text", { x: 38, y: placeY(level) + 4, "text-anchor": "end" }, level.toFixed(3));
  }
  for (const share of [0, 0.25, 0.5, 0.75]) draw("text", { x: placeX(share), y: 184, "text-anchor": "middle" }, `${100 * share} %`);
  draw("polyline", { points: shares.map((share, at) => `${placeX(share)},${placeY(accuracies[at])}`).join(" ") });
  draw("circle", { r: 6 });
}
drawCurve();
abstain();
find("abstain").addEventListener("input", abstain);
