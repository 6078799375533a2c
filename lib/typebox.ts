/*!
 * Built into this file: TypeBox, https://github.com/sinclairzx81/typebox, MIT License, Copyright (c) 2017-2026 Haydn Paterson
 */

// The part of TypeBox that is used at run time. The build bundles it, because loading 266 files of TypeBox and 60 of ours took nearly as long as
// the rest of an app's start.
export { KindGuard, Type } from '@sinclair/typebox'
export { TypeCompiler } from '@sinclair/typebox/compiler'
