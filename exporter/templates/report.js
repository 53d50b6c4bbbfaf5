"use strict";
// A click on a column's head sorts its table by that column; again, the other way round.
const key = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent.trim().replace(/^−/, "-");
  if (text === "" || text === "–") return null;
  if (text === "equal") return Infinity;
  if (text === "not finite") return -Infinity;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b || 0; // infinite both: NaN
  return String(a).localeCompare(String(b), "en", { numeric: true });
};
const sort = (head) => {
  const up = head.ariaSort !== "ascending";
  const column = head.cellIndex;
  const body = head.closest("table").tBodies[0];
  const keyed = [...body.rows].map((row) => [key(row, column), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last, both ways
    return up ? compare(a, b) : compare(b, a);
  });
  body.append(...keyed.map(([, row]) => row));
  for (const other of head.parentNode.cells) other.ariaSort = "none";
  head.ariaSort = up ? "ascending" : "descending";
};
document.addEventListener("click", (event) => {
  const head = event.target.closest("th[aria-sort]");
  if (head) sort(head);
});
// In a heat map arrow keys walk from cell to cell; each says where it is.
const place = (cell) => {
  const head = [...cell.closest("table").tHead.rows].at(-1).cells[cell.cellIndex];
  cell.title = `${cell.parentNode.cells[0].textContent}, ${head.dataset.of}: ${cell.textContent} dB`;
};
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
for (const table of document.querySelectorAll("table.heat")) {
  const first = table.querySelector("tbody td");
  if (first) first.tabIndex = 0;
  table.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("tbody td");
    if (cell) place(cell);
  });
  table.addEventListener("focusin", (event) => {
    const cell = event.target.closest("tbody td");
    if (!cell) return;
    for (const other of table.querySelectorAll("td[tabindex='0']")) other.tabIndex = -1;
    cell.tabIndex = 0;
    place(cell);
  });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("tbody td");
    const move = MOVES[event.key];
    if (!cell || !move) return;
    const next = table.rows[cell.parentNode.rowIndex + move[0]]?.cells[cell.cellIndex + move[1]];
    if (next?.closest("tbody td") == null) return;
    event.preventDefault();
    next.tabIndex = -1;
    next.focus();
  });
}
