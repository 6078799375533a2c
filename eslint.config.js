import neostandard from 'neostandard'

export default [
  ...neostandard({ ts: true, ignores: ['dist/**', '.tap/**', 'coverage/**'] }),
  {
    // `const X = Type.Object(…)` and `type X = Static<typeof X>` share a name on purpose.
    files: ['**/*.ts'],
    rules: { '@typescript-eslint/no-redeclare': 'off' }
  },
  {
    // What each of these makes for a delivery stays in memory, with its request, until a full collection: V8 makes the hidden
    // class of a generator function's generators, and functions that are literals on the right of `object.property =`, in old
    // space; what AsyncResource.bind defines on its function has the same effect on Node 20 to 24. A delivery costs up to twice
    // as much with one of them. test/delivery/kept.test.ts measures it.
    files: ['lib/**/*.ts'],
    ignores: ['lib/cli/**', 'lib/testing/**'],
    rules: {
      'no-restricted-syntax': ['error',
        { selector: ':function :function[generator=true]', message: 'A generator function within another is made at each call. Put it outside.' },
        { selector: 'AssignmentExpression[left.type="MemberExpression"][right.type=/^(Arrow)?FunctionExpression$/]', message: 'Give the function a name first: const f = …; object.property = f.' },
        { selector: 'CallExpression[callee.object.name="AsyncResource"][callee.property.name="bind"]', message: 'Use inContext of lib/async-context.ts.' }
      ]
    }
  },
  {
    // Files share a process: its tests may come minutes after it was loaded.
    files: ['test/**/*.ts'],
    rules: {
      'no-restricted-syntax': ['error', {
        selector: 'Program > VariableDeclaration > VariableDeclarator > .init:not(:function) CallExpression[callee.object.name=/^(Date|performance)$/][callee.property.name="now"]',
        message: 'This is when the file was loaded. Take the time in the test.'
      }]
    }
  },
  {
    // A declaration that is merged into Fastify's has to name all of its type parameters.
    files: ['lib/index.ts'],
    rules: { '@typescript-eslint/no-unused-vars': 'off' }
  }
]
