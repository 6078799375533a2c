/*!
 * Built into this file: TypeBox, https://github.com/sinclairzx81/typebox, MIT License, Copyright (c) 2017-2026 Haydn Paterson
 */

// What runs of TypeBox. The build puts it in one file with all else that the root needs: to find and load 266 files of TypeBox
// and 60 of ours took nearly as long again as the start of an app.
export { KindGuard, Type } from '@sinclair/typebox'
export { TypeCompiler } from '@sinclair/typebox/compiler'
