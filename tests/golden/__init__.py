"""Numbers of version 0.1, which every later version must reproduce or explain.

A *case* is one command or one architecture and has a file of its own, ``<case>.json``; a *group* is a part of it that
can be recorded again alone, with the reason in the changelog. Everything goes through the façade or what the command
line calls, so that the inside can change.
"""
