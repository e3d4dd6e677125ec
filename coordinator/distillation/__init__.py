"""Step 5: uploads aggregated, the global student trained; when it runs, and where."""
