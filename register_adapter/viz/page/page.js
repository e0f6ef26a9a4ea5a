"use strict";
// Headings become buttons here, so that without JavaScript no button stands there that does nothing.
for (const heading of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = heading.textContent;
  heading.replaceChildren(button);
  heading.setAttribute("aria-sort", "none");
  button.addEventListener("click", () => sort(heading));
}

function sort(heading) {
  const table = heading.closest("table");
  const body = table.tBodies[0];
  const column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.value }));
  const given = rows.filter((one) => one.key !== "");
  const numeric = given.every((one) => Number.isFinite(Number(one.key)));
  given.sort((a, b) => {
    const order = numeric ? a.key - b.key : a.key.localeCompare(b.key);
    return down ? -order : order;
  });
  // What is missing stands last, whichever way.
  const missing = rows.filter((one) => one.key === "");
  body.append(...[...given, ...missing].map((one) => one.row));
}
