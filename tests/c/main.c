/* The tests of the C interface in one program, which is linked once for each kind of library. */
#include "check.h"

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } programs[] = {
        {"adapt", run_adapt}, {"dump", run_dump},         {"hostile", run_hostile}, {"order", run_order},
        {"panic", run_panic}, {"overhead", run_overhead}, {"threads", run_threads},
    };
    CHECK(argc > 1);
    CHECK(elora_abi_version() == ELORA_ABI_VERSION);
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        if (strcmp(argv[1], programs[i].name) == 0) {
            return programs[i].run(argc - 2, argv + 2);
        }
    }
    fprintf(stderr, "no program %s\n", argv[1]);
    return 2;
}
