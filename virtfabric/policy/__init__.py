"""Decisions: snapshot + request -> amounts -> plan, or a refusal. Pure; knows no clock and no I/O.

`standing` (what each guest holds, its bounds, its cost) · `changes` (what a request comes to) ·
`victims` (who pays, in which order) · `arbiter` (how much) · `homecoming`, `loans` (what goes home,
the books afterwards) · `layout`, `offers`, `placement` (which pCPUs and nodes, and the steps).

PCIe functions: `pools` (the host's facts), `stock` (which can be given, to whom), `deviceterms`
(what one guest may hold), `functions`, `functionoffers`, `functionsteps` (which ones, and the
steps), `functionrepairs` (books against what is found), `wishes` (who waits for one).
"""
