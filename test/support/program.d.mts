import type { ChildProcess, ChildProcessByStdio, ExecFileOptions, ForkOptions, SpawnOptions, StdioNull, StdioPipe } from 'node:child_process'
import type { Readable, Writable } from 'node:stream'

/** The environment of a user's program: `process.env` without the variables of the test runner. */
export const environment: Readonly<Record<string, string>>

/** `spawn(process.execPath, args, options)` with that environment. */
export function spawnProgram (args: readonly string[], options: SpawnOptions & { stdio: ['ignore', StdioPipe, StdioPipe] }): ChildProcessByStdio<null, Readable, Readable>
export function spawnProgram (args: readonly string[], options: SpawnOptions & { stdio: ['ignore', StdioPipe, StdioNull] }): ChildProcessByStdio<null, Readable, null>
export function spawnProgram (args: readonly string[], options: SpawnOptions & { stdio: [StdioPipe, StdioPipe, StdioNull] }): ChildProcessByStdio<Writable, Readable, null>
export function spawnProgram (args: readonly string[], options?: SpawnOptions): ChildProcess

/** `fork(file, args, options)` with that environment. */
export function forkProgram (file: string, args?: readonly string[], options?: ForkOptions): ChildProcess

/** Runs a program to its end. Rejects with its output when the exit code is not 0. */
export function runProgram (args: readonly string[], options?: ExecFileOptions): Promise<{ stdout: string, stderr: string }>
