import { readFileSync } from 'node:fs'

// What test/long/compatibility.test.ts checks, and docs/compatibility.md says.

export const { engines, peerDependencies: peers } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
  engines: { node: string }
  peerDependencies: Record<string, string>
}

/** The first version that a range has: `^6 || ^7` begins with 6.0.0. */
export function oldestOf (range: string): string {
  const [major, minor = '0', patch = '0'] = /\d+(?:\.\d+)*/.exec(range)![0].split('.')
  return [major, minor, patch].join('.')
}

/** The versions of a range in its last major, for npm: `^6 || ^7` ends with `^7`. */
export const newestOf = (range: string): string => range.split('||').at(-1)!.trim()

/** The first of each range of `engines`, then the newest of each major that is maintained. */
export const NODES = [...engines.node.split('||').map(oldestOf), '22', '24', '26']

export const TYPESCRIPTS = ['5.5', '5.9', '6', '7']
export const NODE_TYPES = ['22', '24', '26']
