export { sqliteStore } from '../stores/sqlite.ts'
export { durable } from '../runners/durable.ts'
export type { DeadDelivery, DurableOptions, DurableRunner } from '../runners/durable.ts'
export type { SqliteDatabase, SqliteStatement } from './database.ts'
