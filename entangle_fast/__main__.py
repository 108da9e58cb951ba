from entangle_fast.cli import main

main()
