"""Structured generation: from a schema, regex or grammar to the set of tokens that may come next.

`protocol` is what the engine sees, `compiler` compiles off the caller's thread, `schema` turns a JSON schema
into a grammar that accepts exactly what the schema does, or refuses it by its JSON pointer (promise P5).
"""
