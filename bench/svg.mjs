// Horizontal bars with whiskers. The chart has a background of its own, so that it can be read on any page.
const WIDTH = 800
const LABELS = 300
const VALUES = 56
const BAR = 11
const ROW = 36
const TOP = 66
const BOTTOM = 30

const STYLE = `
    svg { font: 12px system-ui, sans-serif }
    .card { fill: #fff; stroke: #d0d7de } .grid { stroke: #d8dee4 } .whisker { stroke: #1f2328 } text { fill: #1f2328 } .tick { fill: #59636e }
    .s0 { fill: #6e7781 } .s1 { fill: #afb8c1 } .ours.s0 { fill: #0969da } .ours.s1 { fill: #80b9f5 } .title, .name.ours { font-weight: 600 }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #2a313c } .whisker { stroke: #f0f6fc } text { fill: #f0f6fc } .tick { fill: #9198a1 }
      .s0 { fill: #9198a1 } .s1 { fill: #565e68 } .ours.s0 { fill: #4493f8 } .ours.s1 { fill: #1f5a9e }
    }
  `

/**
 * @param {object} chart
 * @param {string} chart.title
 * @param {string[]} chart.series a bar of each row for each, two at most
 * @param {Array<{ label: string, isOurs: boolean, values: Array<{ median: number, min: number, max: number }> }>} chart.rows
 * @returns {string} SVG
 */
export function barChart ({ title, series, rows }) {
  const height = TOP + rows.length * ROW + BOTTOM
  const step = tickStep(Math.max(...rows.flatMap(({ values }) => values.map(({ max }) => max))))
  const greatest = Math.ceil(Math.max(...rows.flatMap(({ values }) => values.map(({ max }) => max))) / step) * step
  const scale = value => value / greatest * (WIDTH - LABELS - VALUES)
  const x = value => LABELS + scale(value)
  const ticks = Array.from({ length: Math.round(greatest / step) + 1 }, (_, index) => index * step)

  return element('svg', { xmlns: 'http://www.w3.org/2000/svg', viewBox: `0 0 ${WIDTH} ${height}`, width: WIDTH, height, role: 'img', 'aria-label': title }, [
    element('style', {}, [STYLE]),
    element('rect', { class: 'card', x: 0.5, y: 0.5, width: WIDTH - 1, height: height - 1, rx: 6 }),
    text('title', 16, 24, title),
    ...series.flatMap((label, index) => [
      element('rect', { class: `ours s${index}`, x: 16 + index * 90, y: 38, width: 11, height: 11 }),
      element('rect', { class: `s${index}`, x: 29 + index * 90, y: 38, width: 11, height: 11 }),
      text('tick', 46 + index * 90, 48, label)
    ]),
    ...ticks.flatMap(tick => [
      element('line', { class: 'grid', x1: round(x(tick)), x2: round(x(tick)), y1: TOP - 6, y2: height - BOTTOM }),
      text('tick', x(tick), height - BOTTOM + 16, String(tick), 'middle')
    ]),
    ...rows.flatMap(({ label, isOurs, values }, row) => {
      const top = TOP + row * ROW
      const ours = isOurs ? 'ours ' : ''
      return [
        text(`${ours}name`, LABELS - 10, top + BAR + 5, label, 'end'),
        ...values.flatMap(({ median, min, max }, index) => {
          const y = top + index * (BAR + 2)
          const middle = y + BAR / 2
          return [
            element('rect', { class: `${ours}s${index}`, x: LABELS, y, width: round(scale(median)), height: BAR }),
            element('path', { class: 'whisker', d: `M${round(x(min))} ${middle}H${round(x(max))}M${round(x(min))} ${middle - 3}v6M${round(x(max))} ${middle - 3}v6` }),
            text('tick', x(max) + 6, y + BAR - 1, median.toFixed(1))
          ]
        })
      ]
    })
  ]) + '\n'
}

/** 1, 2 or 5 times a power of ten, so that there are four to ten steps. */
function tickStep (greatest) {
  const power = 10 ** Math.floor(Math.log10(greatest / 4))
  return [5, 2, 1].map(factor => factor * power).find(step => greatest / step >= 4)
}

const round = value => Math.round(value * 10) / 10

const escape = value => String(value).replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;')

function element (name, attributes, children) {
  const tag = [name, ...Object.entries(attributes).map(([key, value]) => `${key}="${escape(value)}"`)].join(' ')
  return children === undefined ? `<${tag}/>` : `<${tag}>${children.map(child => child.startsWith('<') ? `\n  ${child}` : child).join('')}${children.some(child => child.startsWith('<')) ? '\n' : ''}</${name}>`
}

const text = (style, x, y, content, anchor = 'start') =>
  element('text', { class: style, x: round(x), y, 'text-anchor': anchor }, [escape(content)])
