"""What attacks share: the search for many victims at once, its lanes, processes and auditor."""
