/* The test images. Only the rows of one page exist; the pictures are read once they are needed. */
function showImages() {
  const { names, rows } = data, form = find("filters"), table = find("table"), first = find("row").content;
  const total = rows.files.length, wrong = rows.labels.map((label, at) => label !== rows.predictions[at]);
  rows.right = wrong.map((value) => value ? "wrong" : "right");
  const all = [...Array(total).keys()];
  let sorted = all, found = all, page = 0, thumbnails = null;

  const picture = (at) => {
    if (!thumbnails && find("thumbnails")) thumbnails = JSON.parse(find("thumbnails").textContent);
    return thumbnails?.[at];
  };
  function makeRow(at) {
    const row = first.cloneNode(true), cells = row.querySelectorAll("td"), file = rows.files[at];
    const image = row.querySelector("img"), button = row.querySelector(".copy"), content = picture(at);
    image.alt = file;
    if (content) image.src = `data:image/jpeg;base64,${content}`;
    image.parentNode.hidden = !content;
    cells[1].querySelector("bdi").textContent = file;
    button.dataset.copy = JSON.stringify(file);
    button.setAttribute("aria-label", `copy the name ${file}`);
    cells[2].querySelector("bdi").textContent = names[rows.labels[at]];
    cells[3].querySelector("bdi").textContent = names[rows.predictions[at]];
    cells[4].textContent = rows.probabilities[at].toFixed(3);
    cells[5].firstChild.className = cells[5].firstChild.textContent = rows.right[at];
    cells[6].textContent = rows.groups[at];
    return row;
  }
  function draw() {
    const start = page * PER_PAGE, end = Math.min(start + PER_PAGE, found.length);
    table.tBodies[0].replaceChildren(...found.slice(start, end).map(makeRow));
    tell();
  }
  function tell() {
    const start = page * PER_PAGE, end = Math.min(start + PER_PAGE, found.length);
    const asked = [form.text.value && `“${form.text.value}”`];
    if (form.label.value) asked.push(`label ${names[form.label.value]}`);
    if (form.prediction.value) asked.push(`predicted ${names[form.prediction.value]}`);
    if (form.wrong.checked) asked.push("only wrong");
    const what = asked.filter(Boolean).join(", ");
    find("found").textContent = `${whole(found.length)} of ${whole(total)} images${what && ": "}${what}`;
    find("page").textContent = found.length ? `${whole(start + 1)} to ${whole(end)} of ${whole(found.length)}` : "none";
    find("back").disabled = !page;
    find("on").disabled = end >= found.length;
    find("copy-all").disabled = !found.length;
    document.querySelectorAll(".matrix a").forEach((cell) => {
      const chosen = cell.dataset.label === form.label.value && cell.dataset.prediction === form.prediction.value;
      cell.setAttribute("aria-current", chosen);
    });
  }
  function filter() {
    const text = form.text.value.toLowerCase(), { label, prediction } = form;
    found = sorted.filter((at) => (!text || rows.files[at].toLowerCase().includes(text))
      && (!label.value || rows.labels[at] === Number(label.value))
      && (!prediction.value || rows.predictions[at] === Number(prediction.value))
      && (!form.wrong.checked || wrong[at]));
    page = 0;
    draw();
  }
  function turn(step) {
    page += step;
    draw();
    find("images").scrollIntoView();
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  find("back").addEventListener("click", () => turn(-1));
  find("on").addEventListener("click", () => turn(1));
  find("copy-all").addEventListener("click", () => copy(found.map((at) => rows.files[at]), find("copy-all")));
  headers([...table.querySelectorAll("th[data-sort]")], (head, sign) => {
    const column = rows[head.dataset.sort];
    const classes = names.map((name, at) => at).sort((a, b) => order(names[a], names[b]));
    const rank = classes.reduce((ranks, name, at) => { ranks[name] = at; return ranks; }, []);
    const value = ["labels", "predictions"].includes(head.dataset.sort) ? (at) => rank[column[at]] : (at) => column[at];
    const compare = typeof value(0) === "string" ? order : (a, b) => a - b;
    sorted = [...all].sort((a, b) => sign * compare(value(a), value(b)));
    filter();
  });
  document.querySelectorAll("a[data-label]").forEach((cell) => cell.addEventListener("click", (event) => {
    event.preventDefault();
    form.reset();
    form.label.value = cell.dataset.label;
    form.prediction.value = cell.dataset.prediction;
    setTimeout(() => {
      find("images").scrollIntoView();
      find("found").focus({ preventScroll: true });
    });
  }));
  document.addEventListener("click", (event) => {
    const small = event.target.closest(".thumbnail")?.firstElementChild;
    if (!small) return;
    const viewer = find("viewer");
    viewer.querySelector("img").src = small.src;
    viewer.querySelector("img").alt = viewer.querySelector("bdi").textContent = small.alt;
    const cells = [...(small.closest("tr")?.querySelectorAll("[data-head]") ?? [])];
    viewer.querySelector(".note").textContent = cells.map((cell) => `${cell.dataset.head} ${cell.textContent}`).join(", ");
    viewer.showModal();
  });
  find("viewer").querySelector("button").addEventListener("click", () => find("viewer").close());
  tell();
  document.addEventListener("DOMContentLoaded", draw); // the pictures stand behind this script
}
showImages();
