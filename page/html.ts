import htm from 'htm'
import { h } from 'preact'
import type { ComponentChild, VNode } from 'preact'

/** Values in a template are inserted as text and never as HTML. */
export const html: (strings: TemplateStringsArray, ...values: unknown[]) => VNode = htm.bind(h) as never

export type Child = ComponentChild
