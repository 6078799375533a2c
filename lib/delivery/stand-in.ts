import type { FastifyReply } from 'fastify'

/** What a reply that stands for another one does itself. */
export interface OwnParts {
  readonly methods: Readonly<Record<'code' | 'status' | 'send' | 'then', (...args: any[]) => unknown> & { hijack?: () => unknown }>
  /** The values of its properties; `undefined` for those of the other reply. */
  readonly sent?: () => boolean | undefined
  readonly statusCode?: () => number | undefined
}

/** Makes a reply that stands for another one: everything but `own` is the other's. */
export function standIn (reply: FastifyReply, own: OwnParts): FastifyReply {
  // No accessors among the methods: V8 would keep what they hold, such as the request, until a full garbage collection.
  const original: Record<PropertyKey, unknown> = { __proto__: null, ...own.methods }
  const methods = { ...original }
  const made: FastifyReply = new Proxy(reply, {
    get (target, key, receiver) {
      if (key in original) return methods[key]
      const value = key === 'sent' ? own.sent?.() : key === 'statusCode' ? own.statusCode?.() : undefined
      return value ?? Reflect.get(target, key, receiver)
    },
    set (target, key, value, receiver) {
      // An object that inherits from this reply gets a property of its own.
      if (receiver !== made) return Reflect.set(target, key, value, receiver)
      if (key === 'statusCode') Reflect.apply(own.methods.code, made, [value])
      else if (key in original) methods[key] = value
      else return Reflect.set(target, key, value, made)
      return true
    },
    defineProperty (target, key, descriptor) {
      if (!(key in original)) return Reflect.defineProperty(target, key, descriptor)
      methods[key] = descriptor.value
      return true
    },
    deleteProperty (target, key) {
      if (!(key in original)) return Reflect.deleteProperty(target, key)
      methods[key] = original[key]
      return true
    }
  })
  return made
}
