import htm from 'htm'
import { h } from 'preact'
import type { ComponentChild, VNode } from 'preact'

/** What stands in a template is text, never HTML. */
export const html: (strings: TemplateStringsArray, ...values: unknown[]) => VNode = htm.bind(h) as never

export type Child = ComponentChild
