// Runs the contracts of the store and the runner with every installed SQLite handle, and prints the handles that passed.
import { mkdtempSync, rmSync } from 'node:fs'
import { isBuiltin } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { durable, sqliteStore } from 'fastify-openai-webhook/sqlite'
import { runnerContract, storeContract } from 'fastify-openai-webhook/testing'

const { default: Better } = await import('better-sqlite3')
const { default: Libsql } = await import('libsql')
const handles = {
  libsql: file => new Libsql(file),
  'libsql, defaultSafeIntegers': file => new Libsql(file).defaultSafeIntegers(true),
  'better-sqlite3': file => new Better(file),
  'better-sqlite3, defaultSafeIntegers': file => new Better(file).defaultSafeIntegers(true)
}
if (isBuiltin('node:sqlite')) {
  const { DatabaseSync } = process.getBuiltinModule('node:sqlite')
  handles['node:sqlite'] = file => new DatabaseSync(file)
  handles['node:sqlite, readBigInts'] = file => new DatabaseSync(file, { readBigInts: true })
  handles['node:sqlite, returnArrays'] = file => new DatabaseSync(file, { returnArrays: true })
}

const dir = mkdtempSync(join(tmpdir(), 'handles-'))
let files = 0
for (const [name, open] of Object.entries(handles)) {
  const opened = []
  const fresh = () => {
    const db = open(join(dir, `${++files}.db`))
    opened.push(db)
    return db
  }
  const store = sqliteStore(fresh())
  for (const { run } of [...storeContract(() => store), ...runnerContract(() => durable(fresh(), { backoff: 5 }))]) await run()
  for (const db of opened) db.close()
  console.log(name)
}
rmSync(dir, { recursive: true })
