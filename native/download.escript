#!/usr/bin/env escript
%% download.escript ADDRESS FILE: for build.sh, where there is no curl. The certificates of https are verified with
%% those of the operating system.

main([Address, File]) ->
    %% The reason is one line on standard error.
    ok = logger:set_primary_config(level, none),
    try
        {ok, _} = application:ensure_all_started(inets),
        get(Address, File, 5)
    of
        ok -> ok;
        {error, Reason} -> fail(Reason)
    catch
        _:Reason -> fail(Reason)
    end.

%% An address of https leads to other addresses of https only.
get(Address, File, Redirects) ->
    case httpc:request(get, {Address, []}, options(Address), [{stream, File}]) of
        {ok, saved_to_file} ->
            ok;
        {ok, {{_, Status, _}, Headers, _}} when Status >= 301, Status =< 308, Redirects > 0 ->
            Next = uri_string:resolve(proplists:get_value("location", Headers), Address),
            case is_https(Address) andalso not is_https(Next) of
                true -> {error, {not_https, Next}};
                false -> get(Next, File, Redirects - 1)
            end;
        {ok, {{_, Status, Phrase}, _, _}} ->
            {error, {Status, Phrase}};
        {error, Reason} ->
            {error, Reason}
    end.

options(Address) ->
    Common = [{autoredirect, false}, {connect_timeout, 30000}, {timeout, 600000}],
    case is_https(Address) of
        true ->
            {ok, _} = application:ensure_all_started(ssl),
            Host = [{match_fun, public_key:pkix_verify_hostname_match_fun(https)}],
            [{ssl, [{verify, verify_peer}, {cacerts, public_key:cacerts_get()}, {customize_hostname_check, Host}]}
             | Common];
        false ->
            Common
    end.

is_https(Address) ->
    string:prefix(Address, "https:") =/= nomatch.

fail(Reason) ->
    io:format(standard_error, "httpc: ~0tp~n", [Reason]),
    halt(1).
