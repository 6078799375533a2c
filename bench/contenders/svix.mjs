import { Webhook } from 'svix'
import { SECRET } from '../deliveries.mjs'
import { buildWith } from './verifying-library.mjs'

export const build = async () => buildWith(new Webhook(SECRET))
