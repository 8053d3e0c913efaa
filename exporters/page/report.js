"use strict";
(() => {
  const table = document.getElementById("rows");
  const body = table.tBodies[0];
  const search = document.getElementById("search");
  const verdict = document.getElementById("verdict");
  const found = document.getElementById("found");
  const rows = Array.from(body.rows, (row) => ({ row, text: row.textContent.toLowerCase() }));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { row, text } of rows) {
      const isWanted = words.every((word) => text.includes(word)) &&
        (!verdict.value || row.dataset.verdict === verdict.value);
      row.hidden = !isWanted;
      count += isWanted;
    }
    found.textContent = `${count} of ${rows.length} shown`;
  }

  function sort(heading) {
    const column = heading.cellIndex;
    const isDescending = heading.getAttribute("aria-sort") === "ascending";
    const order = new Intl.Collator("en", { numeric: true });
    const sorted = rows.map(({ row }) => [row.cells[column].textContent, row]);
    sorted.sort((one, other) => order.compare(one[0], other[0]) * (isDescending ? -1 : 1));
    for (const each of heading.parentNode.cells) each.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
    body.append(...sorted.map((pair) => pair[1]));
  }

  function open() {
    const target = /^#path-\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (target) {
      target.open = true;
      target.scrollIntoView();
    }
  }

  document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => sort(button.parentNode));
  }
  addEventListener("hashchange", open);
  open();
})();
