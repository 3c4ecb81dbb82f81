%%% The documentation of the native library's functions: their specs, from the debug information of erlmcp_nif.
-module(nif_specs).

-export([specs/0, functions/0, is_of/2]).

-define(NIF, erlmcp_nif).


functions() ->
    lists:sort(?NIF:module_info(nifs)).


%% [{{Name, Arity}, #{kinds, result}}] of all functions of the library.
specs() ->
    {ok, {_, [{abstract_code, {_, Forms}}]}} =
        beam_lib:chunks(code:which(?NIF), [abstract_code]),
    Types = maps:from_list([ {Name, Type} || {attribute, _, type, {Name, Type, []}} <- Forms ]),
    Specs = maps:from_list([ {Function, clause(Clause)}
                             || {attribute, _, spec, {Function, [Clause]}} <- Forms ]),
    [ begin
          #{Function := {Arguments, Result}} = Specs,
          {Function,
           #{
             kinds => [ kind(Argument) || Argument <- Arguments ],
             result => {Result, Types}
            }}
      end || Function <- functions() ].


clause({type, _, bounded_fun, [Fun, _]}) -> clause(Fun);
clause({type, _, 'fun', [{type, _, product, Arguments}, Result]}) -> {Arguments, Result}.


kind({ann_type, _, [_, Type]}) -> kind(Type);
kind({user_type, _, registry, []}) -> registry;
kind({user_type, _, namespace, []}) -> namespace;
kind({user_type, _, bucket, []}) -> bucket;
kind({user_type, _, limiter, []}) -> limiter;
kind({user_type, _, message_store, []}) -> message_store;
kind({user_type, _, stored_message, []}) -> stored_message;
kind({user_type, _, delivery, []}) -> delivery;
kind({user_type, _, pick, []}) -> pick;
kind({user_type, _, interest, []}) -> interest;
kind({user_type, _, breaker_config, []}) -> breaker_config;
kind({type, _, union, [_, {user_type, _, breaker_config, []}]}) -> breaker_config;
kind({user_type, _, breaker_change, []}) -> breaker_change;
kind({user_type, _, named_breaker_config, []}) -> named_breaker_config;
kind({user_type, _, limits, []}) -> limits;
kind({type, _, union, [{user_type, _, limits, []} | _]}) -> limits;
kind({type, _, union, [{user_type, _, namespace, []} | _]}) -> namespace;
kind({type, _, pid, []}) -> pid;
kind({type, _, boolean, []}) -> boolean;
kind({type, _, Number, []}) when Number =:= pos_integer;
                                 Number =:= non_neg_integer;
                                 Number =:= integer -> number;
kind({type, _, range, _}) -> number;
kind(_) -> term.


is_of(Term, {Type, Types}) -> is_of(Term, Type, Types).


is_of(Term, {type, _, union, Any}, Types) -> lists:any(fun(T) -> is_of(Term, T, Types) end, Any);
is_of(Term, {ann_type, _, [_, Type]}, Types) -> is_of(Term, Type, Types);
is_of(Term, {user_type, _, Name, []}, Types) -> is_of(Term, maps:get(Name, Types), Types);
is_of(_Term, {remote_type, _, _}, _Types) -> true;
is_of(_Term, {var, _, _}, _Types) -> true;
is_of(Term, {atom, _, Atom}, _Types) -> Term =:= Atom;
is_of(Term, {integer, _, Integer}, _Types) -> Term =:= Integer;
is_of(Term, {type, _, tuple, any}, _Types) -> is_tuple(Term);
is_of(Term, {type, _, tuple, Elements}, Types) ->
    is_tuple(Term) andalso
    tuple_size(Term) =:= length(Elements) andalso
    lists:all(fun({T, Type}) -> is_of(T, Type, Types) end,
              lists:zip(tuple_to_list(Term), Elements));
is_of(Term, {type, _, list, []}, _Types) -> is_list(Term);
is_of(Term, {type, _, list, [Type]}, Types) ->
    is_list(Term) andalso
    length(Term) >= 0 andalso
    lists:all(fun(T) -> is_of(T, Type, Types) end, lists:sublist(Term, 3));
is_of(Term, {type, _, nil, []}, _Types) -> Term =:= [];
is_of(Term, {type, _, range, [{integer, _, Low}, {integer, _, High}]}, _Types) ->
    is_integer(Term) andalso Term >= Low andalso Term =< High;
is_of(Term, {type, _, pos_integer, []}, _Types) -> is_integer(Term) andalso Term > 0;
is_of(Term, {type, _, non_neg_integer, []}, _Types) -> is_integer(Term) andalso Term >= 0;
is_of(Term, {type, _, integer, []}, _Types) -> is_integer(Term);
is_of(Term, {type, _, number, []}, _Types) -> is_number(Term);
is_of(Term, {type, _, float, []}, _Types) -> is_float(Term);
is_of(Term, {type, _, boolean, []}, _Types) -> is_boolean(Term);
is_of(Term, {type, _, atom, []}, _Types) -> is_atom(Term);
is_of(Term, {type, _, binary, []}, _Types) -> is_binary(Term);
is_of(Term, {type, _, pid, []}, _Types) -> is_pid(Term);
is_of(Term, {type, _, reference, []}, _Types) -> is_reference(Term);
is_of(Term, {type, _, map, _}, _Types) -> is_map(Term);
is_of(_Term, {type, _, Any, []}, _Types) when Any =:= term; Any =:= any -> true;
is_of(_Term, {type, _, None, []}, _Types) when None =:= none; None =:= no_return -> false.
