"""What a workspace holds, typed: recipes, plans, cycles, runs, champions. No Prefect task is in here."""
