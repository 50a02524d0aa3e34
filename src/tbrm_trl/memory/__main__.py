from .estimate import main

main()
