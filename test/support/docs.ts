import { execFile } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join, sep } from 'node:path'
import { fileURLToPath } from 'node:url'
import ts from 'typescript'

export const ROOT = fileURLToPath(new URL('../..', import.meta.url))

export interface Document {
  /** The path relative to the repository, with slashes. */
  readonly path: string
  readonly text: string
}

export interface CodeBlock {
  readonly path: string
  /** The number of the first line of code. */
  readonly line: number
  readonly language: string
  readonly code: string
}

export function readDocument (path: string): Document {
  return { path, text: readFileSync(join(ROOT, path), 'utf8') }
}

/** README.md, CHANGELOG.md and every document in docs/. */
export function readDocuments (): Document[] {
  const inDocs = readdirSync(join(ROOT, 'docs'), { recursive: true, encoding: 'utf8' })
    .filter(name => name.endsWith('.md'))
    .map(name => `docs/${name.split(sep).join('/')}`)
  return ['README.md', 'CHANGELOG.md', ...inDocs.sort()].map(readDocument)
}

/** The fenced code blocks, including indented ones in lists. Throws for a fence that is not closed. */
export function codeBlocks ({ path, text }: Document): CodeBlock[] {
  const blocks: CodeBlock[] = []
  let open: { indent: number, language: string, line: number, lines: string[] } | undefined
  for (const [index, line] of text.split('\n').entries()) {
    const fence = /^( *)```(\w*)\s*$/.exec(line)
    if (open === undefined) {
      if (fence !== null) open = { indent: fence[1]!.length, language: fence[2]!, line: index + 2, lines: [] }
    } else if (fence === null) {
      open.lines.push(line.slice(open.indent))
    } else {
      blocks.push({ path, line: open.line, language: open.language, code: open.lines.join('\n') + '\n' })
      open = undefined
    }
  }
  if (open !== undefined) throw new Error(`${path}:${open.line - 1}: a code block that is never closed`)
  return blocks
}

/** The cells of all table rows of a document, including header and delimiter rows. `\|` is a bar within a cell. */
export function tableRows ({ text }: Document): string[][] {
  return text.split('\n')
    .filter(line => line.startsWith('|'))
    .map(line => line.split(/(?<!\\)\|/).slice(1, -1).map(cell => cell.trim()))
}

/** The anchors that GitHub makes from a document's headings. */
export function anchors ({ text }: Document): Set<string> {
  const headings = text.replaceAll(/^```[\s\S]*?^```/gm, '').matchAll(/^#+ (.+)$/gm)
  return new Set([...headings].map(([, heading]) => heading!.toLowerCase().replaceAll(/[^\p{L}\p{N}\s_-]/gu, '').replaceAll(' ', '-')))
}

// What the examples assume: an app with the plugin, and functions of the reader. A block that declares one of these names is checked with
// its own declaration.
const GIVEN = `
import type { FastifyInstance } from 'fastify'
import type { IncomingHttpHeaders } from 'node:http'
import type plugin from 'fastify-openai-webhook'
import type inspectorPlugin from 'fastify-openai-webhook/inspector'
declare global {
  const app: FastifyInstance
  const openaiWebhook: typeof plugin
  const inspector: typeof inspectorPlugin
  const rawBody: Buffer
  const headers: IncomingHttpHeaders
  function acceptCall (callId: string, idempotencyKey: string): Promise<void>
  function alertTeam (message: string): Promise<void>
  function deployModel (deployment: { webhookId: string, model: string }): Promise<void>
  function importBatch (id: string): Promise<void>
  function isCustomer (phoneNumber: string | undefined): Promise<boolean>
  function readSecrets (name: string): Promise<{ current: string, previous?: string }>
  function reportFailure (error: Error, webhookId: string | undefined): void
  function saveAnswer (answer: { webhookId: string, responseId: string, text: string, cutBy?: string | undefined }): Promise<void>
  function saveResponse (id: string): Promise<void>
  function saveResult (result: { batch: string, request: string, status: number | undefined, body: unknown, error: unknown }): Promise<void>
}
`

// Declarations of packages that only examples of other approaches use, as far as these examples need them.
const OTHERS = `
declare module 'express' {
  interface Request { readonly body: string, readonly headers: Record<string, string> }
  interface Response { status (code: number): this, send (body?: string): this }
  interface App {
    use (middleware: object): void
    post (path: string, handler: (request: Request, response: Response) => Promise<void>): void
  }
  function express (): App
  namespace express { function text (options: { type: string }): object }
  export default express
}
declare module 'vitest' {
  interface Test {
    (name: string, run: () => Promise<void>): void
    each <Case> (cases: readonly Case[]): (name: string, run: (each: Case) => Promise<void>) => void
  }
  const test: Test
  function onTestFinished (run: () => Promise<void>): void
  function expect (value: unknown): { toBe (expected: unknown): void, toEqual (expected: unknown): void }
}
declare module '@jest/globals' {
  function test (name: string, run: () => Promise<void>): void
  function afterEach (run: () => Promise<void>): void
  function expect (value: unknown): { toBe (expected: unknown): void, toEqual (expected: unknown): void }
}
declare module '*/helper.js' {
  import type { FastifyInstance } from 'fastify'
  function build (t: object): Promise<FastifyInstance>
}
declare module '@prisma/client' {
  interface Transaction {
    $queryRawUnsafe (text: string, ...values: unknown[]): Promise<unknown[]>
    readonly order: { update (change: { where: { batch: string }, data: { imports: { increment: number } } }): Promise<object> }
  }
  export class PrismaClient { $transaction (work: (tx: Transaction) => Promise<void>): Promise<void> }
}
declare module 'fastify-raw-body' {
  import type { FastifyPluginCallback } from 'fastify'
  const plugin: FastifyPluginCallback<{ field?: string, global?: boolean, encoding?: string | false, runFirst?: boolean, routes?: string[] }>
  export default plugin
  module 'fastify' {
    interface FastifyRequest { rawBody?: string | Buffer }
    interface FastifyContextConfig { rawBody?: boolean }
  }
}
`

/** This compiler is five times as fast as the version that can be imported. */
const TSC = join(ROOT, 'node_modules/typescript-7/lib/tsc.js')

const EXTENSIONS: Readonly<Record<string, string>> = { ts: 'ts', typescript: 'ts', js: 'js', javascript: 'js', mjs: 'js' }

/**
 * Type-checks TypeScript and JavaScript blocks with the repository's compiler options. The names of the package stand for its build.
 *
 * @returns one line for each fault, `path:line message`; `checked` counts the blocks
 */
export async function typeCheck (blocks: readonly CodeBlock[]): Promise<{ faults: string[], checked: number }> {
  const code = blocks.filter(({ language }) => language in EXTENSIONS)
  // A module augmentation applies to its whole program, so each such block is checked in a program of its own.
  const augmenting = code.filter(block => block.code.includes('declare module'))
  const plain = code.filter(block => !augmenting.includes(block))
  const programs = [plain, ...augmenting.map(block => [block])].filter(blocks => blocks.length > 0)
  return { faults: (await Promise.all(programs.map(check))).flat(), checked: code.length }
}

/**
 * The declarations of dist/, by the package's names. A user's compiler finds these too, and those of lib/ would be checked with each
 * program.
 */
function declarations (): Record<string, string[]> {
  const { name, exports } = JSON.parse(readDocument('package.json').text) as { name: string, exports: Record<string, string | { default: string }> }
  return Object.fromEntries(Object.entries(exports).flatMap(([path, target]) => typeof target === 'string'
    ? []
    : [[name + path.slice(1), [join(ROOT, target.default.replace(/js$/, 'd.ts'))]]]))
}

/** Checks one program, in a folder of its own within the repository so that it finds the repository's packages. */
async function check (blocks: readonly CodeBlock[]): Promise<string[]> {
  mkdirSync(join(ROOT, '.tap'), { recursive: true })
  const dir = mkdtempSync(join(ROOT, '.tap/blocks-'))
  try {
    const written = new Map(blocks.map(block => [`${block.path}-${block.line}.${EXTENSIONS[block.language]!}`, block]))
    for (const [file, { code }] of written) {
      mkdirSync(dirname(join(dir, file)), { recursive: true })
      writeFileSync(join(dir, file), `${code}export {}\n`)
    }
    writeFileSync(join(dir, 'given.d.ts'), GIVEN)
    writeFileSync(join(dir, 'others.d.ts'), OTHERS)
    writeFileSync(join(dir, 'tsconfig.json'), JSON.stringify({
      extends: join(ROOT, 'tsconfig.json'),
      compilerOptions: { allowJs: true, checkJs: true, paths: declarations(), rootDir: ROOT, rootDirs: [ROOT, dir], typeRoots: [join(ROOT, 'node_modules/@types')] },
      include: ['.']
    }))
    const stdout = await new Promise<string>((resolve, reject) => {
      execFile(process.execPath, [TSC, '--pretty', 'false'], { cwd: dir }, (fault, stdout, stderr) => {
        if (fault === null || stdout !== '') resolve(stdout)
        else reject(new Error(`the compiler failed: ${stderr}`))
      })
    })
    // The details of a fault are indented below it.
    return stdout.trimEnd().split(/\n(?! )/).filter(fault => fault !== '').map(fault => {
      const [, file, line, message] = /^(.+)\((\d+),\d+\): error \w+: (.*)$/s.exec(fault) ?? []
      const block = written.get(file ?? '')
      return block === undefined ? fault : `${block.path}:${block.line + Number(line) - 1} ${message}`
    })
  } finally {
    rmSync(dir, { recursive: true })
  }
}

/** The properties of the interfaces in a file, with their `@default` tags. */
export function interfaceProperties (path: string): Map<string, Map<string, { fallback: string | undefined }>> {
  const source = ts.createSourceFile(path, readDocument(path).text, ts.ScriptTarget.Latest, true)
  const interfaces = source.statements.filter(ts.isInterfaceDeclaration)
  return new Map(interfaces.map(({ name, members }) => [
    name.text,
    new Map(members.filter(ts.isPropertySignature).map(member => {
      const tag = ts.getJSDocTags(member).find(({ tagName }) => tagName.text === 'default')
      return [member.name.getText(source), { fallback: ts.getTextOfJSDocComment(tag?.comment) }]
    }))
  ]))
}

/** The relative links of a document, as paths from the repository's root, each with its `line`. */
export function relativeLinks ({ path, text }: Document): Array<{ line: number, file: string, anchor: string | undefined }> {
  return text.split('\n').flatMap((content, index) =>
    [...content.replaceAll(/`[^`]*`/g, '').matchAll(/\]\(([^)\s]+)\)/g)]
      .map(([, target]) => target!)
      .filter(target => !/^[a-z]+:/.test(target))
      .map(target => {
        const [file, anchor] = target.split('#')
        return { line: index + 1, file: file === '' ? path : join(dirname(path), file!).split(sep).join('/'), anchor }
      }))
}
