"""Registers kdfast in each process that imports verl: `VERL_USE_EXTERNAL_MODULES=kdfast.integrations.verl_plugin`."""

import kdfast.integrations.verl

patch = kdfast.integrations.verl.register()
