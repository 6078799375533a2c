import { readFileSync } from 'node:fs'

// The versions that test/long/compatibility.test.ts checks and docs/compatibility.md states.

export const { engines, peerDependencies: peers } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
  engines: { node: string }
  peerDependencies: Record<string, string>
}

/** The lowest version of a range: 6.0.0 for `^6 || ^7`. */
export function oldestOf (range: string): string {
  const [major, minor = '0', patch = '0'] = /\d+(?:\.\d+)*/.exec(range)![0].split('.')
  return [major, minor, patch].join('.')
}

/** The part of a range with its highest major, for npm: `^7` of `^6 || ^7`. */
export const newestOf = (range: string): string => range.split('||').at(-1)!.trim()

/** The lowest version of each range in `engines`, then the newest version of each maintained major. */
export const NODES = [...engines.node.split('||').map(oldestOf), '22', '24', '26']

export const TYPESCRIPTS = ['5.5', '5.9', '6', '7']
export const NODE_TYPES = ['22', '24', '26']
