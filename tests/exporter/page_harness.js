"use strict";
// Looks at a report's page, which lies unchanged in a frame as wide as a phone, and writes down what it finds.
const frame = document.querySelector("iframe");
const rgb = (text) => {
  const numbers = text.match(/[\d.]+/g).map(Number);
  const scale = text.startsWith("color(") ? 255 : 1;
  return { channels: numbers.slice(0, 3).map((n) => n * scale), alpha: numbers[3] ?? 1 };
};
const luminance = ({ channels }) => {
  const [r, g, b] = channels.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const backdrop = (element, view) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgb(view.getComputedStyle(at).backgroundColor);
    if (colour.alpha === 1) return colour;
  }
  return rgb("rgb(255, 255, 255)");
};
// WCAG 2.2, success criterion 1.4.3: the ratio of a text's luminance and that of what it stands on.
const contrasts = (page, view) => {
  const found = [];
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || ["SCRIPT", "TITLE", "title"].includes(element.tagName)) continue;
    const style = view.getComputedStyle(element);
    const colour = rgb(element.closest("svg") ? style.fill : style.color);
    const [low, high] = [luminance(colour), luminance(backdrop(element, view))].sort((a, b) => a - b);
    found.push({ ratio: (high + 0.05) / (low + 0.05), text: element.textContent.trim().slice(0, 40) });
  }
  return found.sort((a, b) => a.ratio - b.ratio);
};
const column = (table, number) => [...table.tBodies[0].rows].map((row) => row.cells[number].firstChild.textContent);
const sorted = (table, number) => {
  const head = [...table.tHead.rows].at(-1).cells[number];
  const found = { before: column(table, number) };
  head.querySelector("button").click();
  found.once = [head.ariaSort, column(table, number)];
  head.querySelector("button").click();
  found.twice = [head.ariaSort, column(table, number)];
  found.marked = table.querySelectorAll("th[aria-sort='ascending'], th[aria-sort='descending']").length;
  return found;
};
const walked = (page, view) => {
  const table = page.querySelector("table.heat");
  const first = table.querySelector("tbody td");
  first.focus();
  for (const key of ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft"])
    page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const stops = table.querySelectorAll("td[tabindex='0']").length;
  return { row: page.activeElement.parentNode.rowIndex, column: page.activeElement.cellIndex, stops,
           title: page.activeElement.title };
};
window.addEventListener("load", () => {
  const [page, view] = [frame.contentDocument, frame.contentWindow];
  const table = (name) => page.querySelector(`section[aria-labelledby=${name}] table`);
  const names = [...page.querySelectorAll("thead button")].map((button) => button.textContent.trim());
  const result = {
    width: view.innerWidth,
    scrollWidth: page.documentElement.scrollWidth,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    paper: view.getComputedStyle(page.body).backgroundColor,
    contrast: contrasts(page, view).slice(0, 3),
    unnamed: names.filter((name) => !name).length,
    pictures: [...page.images].filter((image) => image.naturalWidth > 0).length,
    walked: walked(page, view),
    numbers: sorted(table("throughput"), 2),
    texts: sorted(table("checks"), 0),
    heat: sorted(table("layers"), 1),
  };
  document.querySelector("pre").textContent = JSON.stringify(result);
});
