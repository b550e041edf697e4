// Runs when the selection, the filter or the choice of columns has changed: everything else is Bokeh's own linking.
const d = source.data
const chosen = [...source.selected.indices].sort((a, b) => d.loss_nats[a] - d.loss_nats[b])

// The layers' view: the front and what is selected, or all vectors, lowest loss first.
const order = [...d.vector.keys()]
  .filter(i => columns.active == 1 || d.on_front[i] || chosen.includes(i))
  .sort((a, b) => d.loss_nats[a] - d.loss_nats[b])
if (order.join() != cells.tags[0]) {
  cells.tags = [order.join()]
  d.column = new Float64Array(d.vector.length).fill(NaN)
  order.forEach((i, at) => { d.column[i] = at })
  const Image = cells.data.image[0].constructor  // Bokeh's array of two dimensions, which has no public name
  const [layers, width] = [d.vector[0].split("-").length, order.length]
  const image = new Image(layers * width, [layers, width])
  order.forEach((i, at) => d.vector[i].split("-").forEach((g, layer) => { image[layer * width + at] = levels.indexOf(+g) }))
  cells.data = {image: [image], width: [width]}
  range.setv({start: -0.5, end: order.length - 0.5})
  source.change.emit()
}

// The table: terms of the filter are parts of a vector or name, or conditions such as decode_ms<9.
const keeps = (i, term) => {
  const [, column, sign, number] = term.match(/^(\w+)([<>])(\S+)$/) ?? []
  if (column in d) return sign == "<" ? d[column][i] < +number : d[column][i] > +number
  return `${d.vector[i]} ${d.name[i]}`.includes(term)
}
const terms = text.value_input.split(/\s+/).filter(term => term)
const shown = [i => true, i => d.on_front[i], i => chosen.includes(i)][only.active]
rows.booleans = [...d.vector.keys()].map(i => Boolean(shown(i)) && terms.every(term => keeps(i, term)))

// Moves of the first selected vector that has some.
const base = chosen.map(i => d.vector[i]).find(vector => bases.includes(vector))
if (base) {
  moved.group = base
  moves_title.text = `Each layer of ${base} alone with other groups`
}

// Selected vectors side by side.
const list = document.getElementById("list")
list.onchange = () => {
  source.selected.indices = [...list.selectedOptions].map(option => +option.value)
  list.focus()  // which the table takes away
}
for (const option of list.options) {
  const selected = chosen.includes(+option.value)
  if (option.selected != selected) option.selected = selected  // else the arrow keys would begin anew
}
const make = (tag, parent, content = "") => parent.appendChild(Object.assign(document.createElement(tag), {textContent: content}))
const place = document.getElementById("selected")
place.replaceChildren()
if (chosen.length) {
  const table = make("table", place)
  const line = (heading, fill) => {
    const row = make("tr", table)
    make("th", row, heading).scope = "row"
    chosen.slice(0, 8).forEach((i, at) => fill(make("td", row), i, at))
  }
  line("vector", (cell, i, at) => d.vector[i].split("-").forEach((g, layer) => {
    const differs = g != d.vector[chosen[0]].split("-")[layer]
    make("span", cell, layer ? "-" : "")
    make(differs ? "mark" : "span", cell, g)
  }))
  line("name", (cell, i) => cell.textContent = d.name[i] + (d.on_front[i] ? " (on the front)" : ""))
  for (const [column, label, origin] of metrics) {
    const write = value => column == "loss_nats" ? value.toFixed(5) : value.toLocaleString("en", {maximumSignificantDigits: 5})
    line(label, (cell, i, at) => {
      const value = d[column][i], first = d[column][chosen[0]]
      cell.textContent = `${write(value)} `
      const change = column == "loss_nats" ? (value - first).toFixed(5) : `${(100 * (value / first - 1)).toFixed(1)} %`
      const more = [origin ?? d.latency_source[i], ...at && first ? [(value >= first ? "+" : "") + change] : []]
      make("span", cell, more.join(", ")).className = "more"
    })
  }
  line("export", (cell, i) => {
    make("code", cell, d.command[i])
    const button = make("button", cell, "Copy")
    button.onclick = () => navigator.clipboard.writeText(d.command[i]).then(() => { button.textContent = "Copied" })
  })
  if (chosen.length > 8) make("p", place, `${chosen.length} vectors are selected; the first 8 are shown.`)
} else {
  make("p", place, "None is selected.")
}
