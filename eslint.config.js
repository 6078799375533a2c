import neostandard from 'neostandard'

export default [
  ...neostandard({ ts: true, ignores: ['dist/**', '.tap/**', 'coverage/**'] }),
  {
    // `const X = Type.Object(…)` and `type X = Static<typeof X>` share a name on purpose.
    files: ['**/*.ts'],
    rules: { '@typescript-eslint/no-redeclare': 'off' }
  },
  {
    // A declaration that is merged into Fastify's has to name all of its type parameters.
    files: ['lib/index.ts'],
    rules: { '@typescript-eslint/no-unused-vars': 'off' }
  }
]
