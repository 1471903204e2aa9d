"""Trust: who a peer is and whose an image is: certificates, TLS sessions, signatures.

A room of its own because of two facts. Cards (`shim`), their drivers (`adapters`) and hosts among
each other (`fabric`) need the very same session, and none of these rooms may import another. And it
cannot be in `protocol`: it moves no bytes, but OpenSSL draws random numbers and reads the clock to
see whether a certificate is still good, which pure rooms do not.

`identity` (what a certificate says) · `authority` (making certificates) · `context` (TLS settings)
· `session` (TLS over any transport) · `link` (a session and a conversation) · `images`.
"""
