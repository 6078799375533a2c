import t from 'tap'
import { cellsOf, faults, inject, PLACES, TARGETS } from '../support/composition.ts'

// 101,556 cells: a third of hooks and error handlers, for every place and route.

const rejections: unknown[] = []
process.on('unhandledRejection', reason => { rejections.push(reason) })

for (const place of Object.keys(PLACES)) {
  for (const target of TARGETS) {
    const cells = cellsOf(3, [place], [target]).filter(cell => cell.target === target)
    if (cells.length === 0) continue // no such route in that place
    t.test(`error handlers set ${place}, ${target}: ${cells.length} cells`, async t => {
      t.same(await faults(cells, ({ app }) => inject(app)), [])
      t.same(rejections.splice(0), [], 'nothing is left to end the process')
    })
  }
}
