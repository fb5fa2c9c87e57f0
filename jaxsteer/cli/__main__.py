from jaxsteer.cli import main

main()
