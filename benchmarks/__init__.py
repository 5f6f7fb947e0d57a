import runners as runners  # its settings have to come before torch
