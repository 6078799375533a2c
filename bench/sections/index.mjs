import * as comparison from './comparison.mjs'

/** In the order of the report. */
export const sections = Object.fromEntries([comparison].map(section => [section.name, section]))
