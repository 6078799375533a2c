import { readdirSync } from 'node:fs'

// Every file of lib counts, for every test: one that no test loads is not covered either.
const lib = readdirSync(new URL('../../lib', import.meta.url), { recursive: true })
  .filter(file => file.endsWith('.ts'))
  .map(file => `lib/${file}`)

export default () => lib
