// Sorts, filters and copies the tables of a report, which is whole without it. It is inlined, so that the page asks for
// nothing; own code, as the libraries that do this are larger than all of a page's text.
"use strict";
(() => {
  const made = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // A cell's number, or its text; gaps come last whichever way is sorted.
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.classList.contains("gap") ? null : cell.textContent.trim().toLowerCase();
  };

  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), undefined, { numeric: true });
  };

  // Rows stay below the heading of their group.
  const sort = (table, column, way) => {
    const sign = way === "descending" ? -1 : 1;
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      const place = (row) => (way === "none" ? Number(row.dataset.place) : value(row, column));
      rows.sort((a, b) => compare(place(a), place(b), sign));
      body.append(...rows);
    }
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      if (head.tagName === "TH") head.setAttribute("aria-sort", i === column ? way : "none");
    });
  };

  const sortable = (table) => {
    for (const body of table.tBodies) [...body.rows].forEach((row, i) => { row.dataset.place = i; });
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (head.tagName !== "TH") return; // a corner without words
      const button = made("button", head.textContent, { type: "button", class: "sort", title: "sort by this column" });
      const ways = head.classList.contains("number") ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const now = ways.indexOf(head.getAttribute("aria-sort"));
        sort(table, column, ways[(now + 1) % ways.length]);
      });
    });
  };

  const filterable = (table, bar, name) => {
    const rows = [...table.tBodies].flatMap((body) => [...body.rows].filter((row) => !row.classList.contains("group")));
    const input = made("input", "", { type: "search", placeholder: "filter rows", "aria-label": `filter the rows of ${name}` });
    const count = made("output", "", { "aria-live": "polite" });
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = `${row.dataset.group || ""} ${row.textContent}`.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      for (const body of table.tBodies) {
        const members = [...body.rows];
        if (members[0].classList.contains("group")) members[0].hidden = members.slice(1).every((row) => row.hidden);
      }
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
    bar.prepend(input, count);
  };

  const copy = async (text) => {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    const area = made("textarea", text, { "aria-hidden": "true" }); // pages opened as files have no clipboard everywhere
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser does not allow it");
  };

  const copyable = (bar, source, name) => {
    for (const [kind, text] of Object.entries(JSON.parse(source.textContent))) {
      const label = `copy as ${kind}`;
      const button = made("button", label, { type: "button", "aria-label": `${label}: ${name}` });
      button.addEventListener("click", () => {
        const tell = (said) => {
          button.textContent = said;
          setTimeout(() => { button.textContent = label; }, 2000);
        };
        copy(text).then(() => tell("copied"), (error) => tell(`not copied: ${error.message}`));
      });
      bar.append(button);
    }
  };

  for (const block of document.querySelectorAll(".block")) {
    const bar = block.querySelector(".bar");
    const table = block.querySelector("table");
    const name = table.caption.textContent;
    sortable(table);
    if (table.querySelectorAll("tbody tr:not(.group)").length > 5) filterable(table, bar, name);
    copyable(bar, block.querySelector("script"), name);
  }
  // What is folded away on the screen is printed.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
