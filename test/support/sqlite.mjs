// The SQLite handles that the tests and the programs that they start run with.
import { isBuiltin } from 'node:module'
import Libsql from 'libsql'

/** Why tests with the handle cannot run here, by name. */
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
  // `open` of node:sqlite is a method.
  if (db.open === true || db.isOpen === true) db.close()
}

/** As node:sqlite has them, for where it is not: statements that read arrays and BigInts until they are told otherwise. */
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

/** Handles that read rows otherwise than as objects with numbers. */
export const READING = [
  { name: 'libsql, defaultSafeIntegers', skip: missing.libsql, open: file => openSqlite(file).defaultSafeIntegers(true) },
  { name: 'libsql in the way of node:sqlite', skip: missing.libsql, open: file => inTheWayOfNode(openSqlite(file)) },
  { name: 'node:sqlite, readBigInts', skip: missing['node:sqlite'], open: file => openSqlite(file, 'node:sqlite', { readBigInts: true }) },
  { name: 'node:sqlite, returnArrays', skip: missing['node:sqlite'], open: file => openSqlite(file, 'node:sqlite', { returnArrays: true }) }
]
