"""Decisions: snapshot + request -> amounts -> plan, or a refusal. Pure; knows no clock and no I/O.

`standing` (what each guest holds, its bounds, its cost) · `victims` (who pays, in which order) ·
`arbiter` (how much) · `loans` (what goes home, the books afterwards) · `layout`, `offers`,
`placement` (which pCPUs and nodes, and the steps).
"""
