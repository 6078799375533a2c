// The SQLite handles of the tests and of the programs that they start.
import { isBuiltin } from 'node:module'
import Libsql from 'libsql'

/** By name of the handle: why tests with it cannot run here, or `false`. */
export const missing = {
  libsql: false,
  'node:sqlite': !isBuiltin('node:sqlite') && `needs node:sqlite, which Node ${process.versions.node} has not`
}

export const HANDLES = Object.keys(missing)

export function openSqlite (file, name = 'libsql', options = {}) {
  if (name === 'libsql') return new Libsql(file)
  const { DatabaseSync } = process.getBuiltinModule('node:sqlite')
  return new DatabaseSync(file, options)
}

export function closeSqlite (db) {
  // In node:sqlite, `open` is a method.
  if (db.open === true || db.isOpen === true) db.close()
}

/** Imitates statements of node:sqlite that read arrays and BigInts until they are set otherwise, for versions of Node without them. */
function inTheWayOfNode (db) {
  return {
    exec: sql => db.exec(sql),
    prepare (sql) {
      const statement = db.prepare(sql)
      statement.safeIntegers(true)
      if (statement.reader) statement.raw(true)
      return {
        run: (...parameters) => statement.run(...parameters),
        all: (...parameters) => statement.all(...parameters),
        setReadBigInts: enabled => statement.safeIntegers(enabled),
        setReturnArrays: enabled => statement.reader && statement.raw(enabled)
      }
    },
    close: () => db.close()
  }
}

/** Handles that do not read rows as objects with numbers. */
export const READING = [
  { name: 'libsql, defaultSafeIntegers', skip: missing.libsql, open: file => openSqlite(file).defaultSafeIntegers(true) },
  { name: 'libsql in the way of node:sqlite', skip: missing.libsql, open: file => inTheWayOfNode(openSqlite(file)) },
  { name: 'node:sqlite, readBigInts', skip: missing['node:sqlite'], open: file => openSqlite(file, 'node:sqlite', { readBigInts: true }) },
  { name: 'node:sqlite, returnArrays', skip: missing['node:sqlite'], open: file => openSqlite(file, 'node:sqlite', { returnArrays: true }) }
]
