"""One publisher of KV events: its sockets, its account, several of one rank as one."""
