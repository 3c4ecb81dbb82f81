/* malloc_trim:trim/0. See malloc_trim.erl. */
#include <erl_nif.h>
#include <malloc.h>

static ERL_NIF_TERM trim(ErlNifEnv *env, int argc, const ERL_NIF_TERM argv[])
{
    (void) argc;
    (void) argv;
    malloc_trim(0);
    return enif_make_atom(env, "ok");
}

static ErlNifFunc functions[] = {{"trim", 0, trim, ERL_NIF_DIRTY_JOB_CPU_BOUND}};

ERL_NIF_INIT(malloc_trim, functions, NULL, NULL, NULL, NULL)
