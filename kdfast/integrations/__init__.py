"""kdfast in the places of other libraries' losses: a file for each library, imported by nobody else.

Import the one that is needed, as `import kdfast.integrations.trl`. It needs that library and imports it itself.
"""
