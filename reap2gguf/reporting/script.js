"use strict";
// Sorts tables, shows what a mark stands for, and copies commands. Without it the page reads the
// same: titles of marks are then the browser's own tooltips.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);

  const hide = () => { tip.hidden = true; };

  // The tooltip lies above what it is about, or below where there is no room; it moves with it when
  // the page is scrolled. `boxOf` says where that is now.
  let boxOf = null;
  const place = () => {
    if (tip.hidden || !boxOf) return;
    const box = boxOf(), edge = 8;
    const middle = box.left + box.width / 2 - tip.offsetWidth / 2;
    const right = document.documentElement.clientWidth - tip.offsetWidth - edge;
    const above = box.top - tip.offsetHeight - 10;
    tip.style.left = `${Math.max(edge, Math.min(middle, right))}px`;
    tip.style.top = `${above > edge ? above : box.bottom + 10}px`;
  };
  const show = (text, where) => {
    const [first, ...rest] = text.split("\n");
    const head = document.createElement("b");
    head.textContent = first;
    tip.replaceChildren(head, rest.join("\n"));
    tip.hidden = false;
    boxOf = where;
    place();
  };
  window.addEventListener("scroll", place, { passive: true, capture: true });

  // ---------------------------------------------------------------- tables
  const value = (row, index) => {
    const raw = row.cells[index].dataset.value;
    return raw === undefined ? null : raw;
  };
  const compare = (isNumber, one, other) =>
    isNumber ? Number(one) - Number(other) : one.localeCompare(other, "en", { numeric: true });

  const sort = (table, head) => {
    const index = head.cellIndex, body = table.tBodies[0], rows = [...body.rows];
    const known = rows.filter((row) => value(row, index) !== null);
    const unknown = rows.filter((row) => value(row, index) === null);
    const isNumber = known.every((row) => Number.isFinite(Number(value(row, index))));
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    known.sort((a, b) => sign * compare(isNumber, value(a, index), value(b, index)));
    body.append(...known, ...unknown);
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, head));
    }
  }

  // ---------------------------------------------------------------- charts
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  for (const chart of document.querySelectorAll(".chart")) {
    const marks = [...chart.querySelectorAll(".mark")];
    if (!marks.length) continue;
    let current = -1;
    const leave = () => {
      if (current >= 0) marks[current].classList.remove("current");
      hide();
    };
    const go = (index) => {
      leave();
      current = index;
      marks[current].classList.add("current");
      const shape = marks[current].querySelector("circle, .area, rect, line");
      show(marks[current].dataset.tip, () => shape.getBoundingClientRect());
    };
    for (const mark of marks) {
      const title = mark.querySelector("title");
      mark.dataset.tip = title.textContent;
      title.remove();
      mark.addEventListener("pointerenter", () => {
        leave();
        const shape = mark.querySelector("circle, .area, rect, line");
        show(mark.dataset.tip, () => shape.getBoundingClientRect());
      });
      mark.addEventListener("pointerleave", leave);
    }
    chart.tabIndex = 0;
    chart.setAttribute("aria-label", `${chart.getAttribute("aria-label")}; arrow keys go through it`);
    chart.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (step !== undefined) go((Math.max(current, step < 0 ? 0 : -1) + step + marks.length) % marks.length);
      else if (event.key === "Home") go(0);
      else if (event.key === "End") go(marks.length - 1);
      else if (event.key === "Escape") leave();
      else return;
      event.preventDefault();
    });
    chart.addEventListener("blur", leave);
  }

  // ---------------------------------------------------------------- grids of experts
  const blocks = new Map();
  const data = (name) => {
    if (!blocks.has(name)) blocks.set(name, JSON.parse(document.getElementById(name).textContent));
    return blocks.get(name);
  };
  const cellText = (found, row, column, isRanked) => {
    const expert = isRanked ? found.order[row][column] : column;
    const isKept = found.kept[row][expert] === "1";
    const into = found.into && found.into[row];
    const gone = into ? `merged into expert ${into[expert]}` : "dropped";
    const lines = [`Layer ${found.layers[row]}, expert ${expert}: ${isKept ? "kept" : gone}`];
    const members = into && isKept ? into.filter((one) => one === expert).length : 1;
    if (members > 1) lines.push(`${members - 1} more merged into it`);
    if (found.scores) {
      const rank = isRanked ? column : found.order[row].indexOf(expert);
      lines.push(`${found.method} score ${found.scores[row][expert]}, rank ${rank + 1} of ${found.kept[row].length}`);
    }
    if (found.before) lines.push(`${found.before[row][expert].toLocaleString("en")} tokens before ${found.act}`);
    if (isKept && found.after && found.after[row]) {
      const place = [...found.kept[row].slice(0, expert)].filter((one) => one === "1").length;
      lines.push(`${found.after[row][place].toLocaleString("en")} tokens after, as expert ${place}`);
    }
    return lines.join("\n");
  };
  const within = (at, most) => Math.max(0, Math.min(at, most - 1));

  for (const grid of document.querySelectorAll("svg[data-cells]")) {
    const { width: nColumns, height: nRows } = grid.viewBox.baseVal;
    const isRanked = grid.dataset.order === "score";
    const cursor = document.createElement("div");
    cursor.className = "cursor";
    cursor.hidden = true;
    grid.parentElement.append(cursor);
    let row = 0, column = -1;
    const go = (y, x) => {
      row = within(y, nRows);
      column = within(x, nColumns);
      const box = grid.getBoundingClientRect();
      const width = box.width / nColumns, height = box.height / nRows;
      Object.assign(cursor.style, {
        left: `${grid.parentElement.clientLeft + column * width}px`,
        top: `${row * height}px`,
        width: `${width}px`,
        height: `${height}px`,
      });
      cursor.hidden = false;
      const found = data(grid.dataset.cells);
      show(cellText(found, row, column, isRanked), () => cursor.getBoundingClientRect());
    };
    const leave = () => {
      cursor.hidden = true;
      hide();
    };
    grid.addEventListener("pointermove", (event) => {
      const box = grid.getBoundingClientRect();
      go(
        Math.floor(((event.clientY - box.top) / box.height) * nRows),
        Math.floor(((event.clientX - box.left) / box.width) * nColumns),
      );
    });
    grid.addEventListener("pointerleave", leave);
    grid.tabIndex = 0;
    grid.setAttribute("aria-label", `${grid.getAttribute("aria-label")}; arrow keys go through it`);
    grid.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") go(row, column + 1);
      else if (event.key === "ArrowLeft") go(row, column - 1);
      else if (event.key === "ArrowDown") go(row + 1, column);
      else if (event.key === "ArrowUp") go(row - 1, column);
      else if (event.key === "Escape") leave();
      else return;
      event.preventDefault();
    });
    grid.addEventListener("blur", leave);
  }

  // ---------------------------------------------------------------- commands and print
  for (const block of document.querySelectorAll("pre")) {
    if (!navigator.clipboard) break;
    const frame = document.createElement("div");
    frame.className = "copied";
    block.replaceWith(frame);
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    frame.append(block, button);
  }
  window.addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
  });
})();
