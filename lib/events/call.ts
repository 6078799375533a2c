import { Type } from '../typebox.ts'
import { family, known, markedFamily } from './schema.ts'

const sip = {
  sip_headers: Type.Array(Type.Object({ name: Type.String(), value: Type.String() })),
  sip_media_security: Type.Optional(known('rtp', 'srtp'))
}

const LIVE_SESSION = 'live_685c059af31881908c5a7e20d4b96f13'
const sample = {
  sip_headers: [
    { name: 'From', value: 'sip:+14155550100@sip.example.com' },
    { name: 'To', value: 'sip:proj_Vt5kJ8wQmB2xLzR7nYcG4hDs@sip.api.openai.com' },
    { name: 'Call-ID', value: '03782086-4ce9-44bf-8b0d-4e303d2cc590' }
  ],
  sip_media_security: 'srtp'
}

/** Incoming calls have no `data.id`. They are accepted by their call id or session id. */
export const call = family({
  'realtime.call.incoming': {
    description: 'Sent when an incoming SIP call is available for Realtime acceptance. No data.id.',
    data: Type.Object({ call_id: Type.String(), ...sip }),
    sample: { call_id: 'rtc_8f3c1e7a5b9d4026ae10c4d97b52f683', ...sample }
  },
  'live.call.incoming': {
    description: 'Sent when an incoming SIP session is available for Live acceptance (kept for old subscriptions). No data.id.',
    data: Type.Object({ session_id: Type.String(), ...sip }),
    sample: { session_id: LIVE_SESSION, ...sample }
  },
  'live.transport.incoming': {
    description: 'Sent when an incoming API SIP session is available for Live acceptance. The same pending session can also emit realtime.call.incoming: the first successful accept, Realtime or Live, decides. No data.id.',
    data: Type.Object({ session_id: Type.String(), type: Type.Literal('sip'), ...sip }),
    sample: { session_id: LIVE_SESSION, type: 'sip', ...sample }
  }
})

/** These events need no acceptance, because the session is already running. */
export const connection = markedFamily({
  'live.transport.connected': {
    description: 'Sent when a direct Live WebRTC session is created or an Instant Connect session activates. data.session_id attaches a sideband observer. No data.id.',
    data: Type.Object({ session_id: Type.String(), type: Type.Literal('webrtc') }),
    sample: { session_id: LIVE_SESSION, type: 'webrtc' }
  }
})
