"use strict";
(() => {
  const all = (what, inside = document) => [...inside.querySelectorAll(what)];

  // --- figures: for the window's width and colours, drawn anew when these change ---
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 740px)");
  const draw = () => {
    for (const box of all(".drawn")) {
      const looks = JSON.parse(document.getElementById(box.dataset.figure).textContent);
      const look = `${narrow.matches ? "column" : "page"}-${dark.matches ? "dark" : "light"}`;
      const figure = looks[look] || looks.any;
      Plotly.react(box, figure.data, figure.layout, { displayModeBar: false });
    }
  };
  if (window.Plotly) {
    draw();
    dark.addEventListener("change", draw);
    narrow.addEventListener("change", draw);
  }

  // --- files ---
  const slug = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "figure";
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const csv = (rows) => rows.map((row) => row.map((cell) => {
    const text = cell === null || cell === undefined ? "" : String(cell);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",") + "\r\n").join("");

  // what is drawn, a point a row; plotly keeps numbers as typed arrays
  const points = (box) => {
    const rows = [["trace", "x", "y", "value"]];
    for (const trace of box._fullData) {
      const name = trace.name || "";
      const xs = trace.x || [], ys = trace.y || [];
      if (trace.type === "heatmap") {
        [...trace.z].forEach((line, i) => [...line].forEach((value, k) =>
          rows.push([name, xs[k] ?? k, ys[i] ?? i, value])));
      } else {
        for (let i = 0; i < Math.max(xs.length, ys.length); i += 1) rows.push([name, xs[i], ys[i], ""]);
      }
    }
    return rows;
  };
  for (const tools of all(".figure .tools")) {
    tools.hidden = false;
    const box = tools.parentElement.querySelector(".drawn");
    for (const button of all("button", tools)) {
      button.addEventListener("click", () => {
        const name = `${slug(document.title)}-${box.dataset.figure}`;
        if (button.dataset.save === "csv") save(`${name}.csv`, csv(points(box)));
        else Plotly.downloadImage(box, {
          format: button.dataset.save, filename: name, width: box._fullLayout.width, height: box._fullLayout.height,
          scale: button.dataset.save === "png" ? 3 : 1,
        });
      });
    }
  }

  // --- tables that sort and filter ---
  for (const table of all("table.rows")) {
    const body = table.tBodies[0];
    const first = [...body.rows];
    const text = (row, i) => row.cells[i].textContent.trim();
    all("thead th", table).forEach((head, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const was = head.getAttribute("aria-sort");
        for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
        // up, down, as it was
        const now = was === null ? "ascending" : was === "ascending" ? "descending" : null;
        const rows = [...first];
        if (now !== null) {
          head.setAttribute("aria-sort", now);
          rows.sort((a, b) => text(a, i).localeCompare(text(b, i), undefined, { numeric: true }));
          if (now === "descending") rows.reverse();
        }
        body.append(...rows);
      });
    });
    const tools = document.querySelector(`.tools[data-table="${table.id}"]`);
    tools.hidden = false;
    const [words, missed, button] = ["search", "checkbox", null].map((type) =>
      tools.querySelector(type === null ? "button" : `input[type=${type}]`));
    const counted = tools.querySelector("output");
    const filter = () => {
      const wanted = words.value.toLowerCase();
      let shown = 0;
      for (const row of first) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted) || (missed.checked && !row.dataset.missed);
        if (!row.hidden) shown += 1;
      }
      counted.textContent = `${shown} of ${first.length}`;
    };
    words.addEventListener("input", filter);
    missed.addEventListener("change", filter);
    button.addEventListener("click", () => save(`${slug(document.title)}-${table.id}.csv`, csv(
      [table.tHead.rows[0], ...body.rows].filter((row) => !row.hidden)
        .map((row) => [...row.cells].map((cell) => cell.textContent.trim())))));
    filter();
  }

  // --- lists to copy ---
  for (const button of all("button[data-copy]")) {
    button.hidden = false;
    const source = document.getElementById(button.dataset.copy);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "copied";
      } catch { // no access to the clipboard: the text is selected, ready to be copied
        getSelection().selectAllChildren(source);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 2000);
    });
  }
})();
