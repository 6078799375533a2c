import t from 'tap'
import { missing } from '../support/sqlite.mjs'

t.test('node:sqlite', { skip: missing['node:sqlite'] }, async () => {
  process.env['SQLITE_HANDLE'] = 'node:sqlite'
  await import('./sqlite.test.ts')
})
